/*
 * Control commands of ublk, one at a time or a batch, over a raw io_uring with 128-byte SQEs; and
 * the clock. No library, and nothing of ublkwatch: what is measured by this owes Python nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/ublk_cmd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST 512 /* devices */

struct ring {
	int fd, control;
	unsigned *sq_tail, *sq_array, sq_mask;
	unsigned *cq_head, *cq_tail, cq_mask;
	char *sqes; /* of 128 bytes each */
	struct io_uring_cqe *cqes;
};

static inline void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	fprintf(stderr, ": %s\n", strerror(errno));
	exit(1);
}

/* CLOCK_MONOTONIC in seconds, as Python's time.monotonic() and the kernel's "mono" trace clock. */
static inline double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

/* The CPU time of this thread, in seconds: what it took, not for how long others had the CPU. */
static inline double spent(void)
{
	struct timespec at;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &at);
	return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static inline void nap(double seconds)
{
	struct timespec how_long = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };

	nanosleep(&how_long, NULL);
}

static inline void ring_open(struct ring *ring, unsigned entries)
{
	struct io_uring_params p = { .flags = IORING_SETUP_SQE128 };
	size_t size;
	char *rings;

	ring->control = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	if (ring->control < 0)
		die("/dev/ublk-control");
	ring->fd = (int)syscall(__NR_io_uring_setup, entries, &p);
	if (ring->fd < 0)
		die("io_uring_setup");
	size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	if (size < p.sq_off.array + p.sq_entries * sizeof(unsigned))
		size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	rings = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
	ring->sqes = mmap(NULL, p.sq_entries * 128, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
			  IORING_OFF_SQES);
	if (rings == MAP_FAILED || (void *)ring->sqes == MAP_FAILED)
		die("mmap of the ring");
	ring->sq_tail = (unsigned *)(rings + p.sq_off.tail);
	ring->sq_array = (unsigned *)(rings + p.sq_off.array);
	ring->sq_mask = p.sq_entries - 1;
	ring->cq_head = (unsigned *)(rings + p.cq_off.head);
	ring->cq_tail = (unsigned *)(rings + p.cq_off.tail);
	ring->cq_mask = p.cq_entries - 1;
	ring->cqes = (struct io_uring_cqe *)(rings + p.cq_off.cqes);
}

/* Queue a command; `number` comes back in user_data. The system call is the barrier: no SQPOLL. */
static inline void push(struct ring *ring, unsigned op, int dev_id, void *buffer, unsigned short len,
			__u64 data, unsigned number)
{
	unsigned tail = *ring->sq_tail, at = tail & ring->sq_mask;
	struct io_uring_sqe *sqe = (struct io_uring_sqe *)(ring->sqes + at * 128);
	struct ublksrv_ctrl_cmd *command = (struct ublksrv_ctrl_cmd *)sqe->cmd;

	memset(sqe, 0, 128);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = ring->control;
	sqe->cmd_op = op;
	sqe->user_data = number;
	command->dev_id = (unsigned)dev_id;
	command->queue_id = (__u16)-1;
	command->addr = (__u64)(unsigned long)buffer;
	command->len = len;
	command->data[0] = data;
	ring->sq_array[at] = at;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

/* Submit what was queued, and wait for it; results[user_data] are what the kernel answered. */
static inline void answers(struct ring *ring, unsigned count, int *results)
{
	unsigned submit = count, left = count, head;

	while (left) {
		long taken = syscall(__NR_io_uring_enter, ring->fd, submit, left,
				     IORING_ENTER_GETEVENTS, NULL, 0);
		if (taken < 0 && errno != EINTR)
			die("io_uring_enter");
		if (taken > 0)
			submit -= (unsigned)taken;
		head = *ring->cq_head;
		while (head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) {
			struct io_uring_cqe *cqe = &ring->cqes[head++ & ring->cq_mask];
			results[cqe->user_data] = cqe->res;
			left--;
		}
		__atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
	}
}

/* One command: 0, or a negative errno. */
static inline int control(struct ring *ring, unsigned op, int dev_id, void *buffer,
			  unsigned short len, __u64 data)
{
	int result;

	push(ring, op, dev_id, buffer, len, data, 0);
	answers(ring, 1, &result);
	return result;
}

/* What a driver says on standard input: "WORD dev:pid dev:pid ...". Returns how many devices. */
static inline int pairs(char *words, int *dev_ids, pid_t *pids)
{
	int count = 0;

	for (char *rest, *word = strtok_r(words, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest)) {
		int pid;

		if (count == MOST || sscanf(word, "%d:%d", &dev_ids[count], &pid) != 2)
			die("not dev:pid, or too many: %s", word);
		pids[count++] = pid;
	}
	return count;
}

/* SIGKILL to each of these processes once, by pidfds that are open before the clock is read. */
static inline double kill_all(const pid_t *pids, int count)
{
	int fds[MOST], distinct = 0;
	double at;

	for (int i = 0; i < count; i++) {
		int known = 0;

		for (int j = 0; j < i; j++)
			known |= pids[j] == pids[i];
		if (known)
			continue;
		fds[distinct] = (int)syscall(SYS_pidfd_open, pids[i], 0);
		if (fds[distinct++] < 0)
			die("pidfd_open of %d", pids[i]);
	}
	at = now();
	for (int i = 0; i < distinct; i++) {
		if (syscall(SYS_pidfd_send_signal, fds[i], SIGKILL, NULL, 0))
			die("pidfd_send_signal");
		close(fds[i]);
	}
	return at;
}
