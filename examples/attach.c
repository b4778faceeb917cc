/*
 * A ublk server by ublkwatch's attach contract (docs/servers.md): complete, and as small as it goes.
 *
 *     cc -O2 -pthread -o attach attach.c
 *     attach           discards what is written
 *     attach PREFIX    keeps the data of device N in the file PREFIX<N>
 *
 * It serves one device or many, in one process: one line on standard input for each of them. Exit
 * status 0: its devices are gone. 1: an error that may pass. 78: one that will not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/ublk_cmd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { TEMPORARY = 1, PERMANENT = 78 }; /* 78 is EX_CONFIG: ublkwatch does not try again */

struct device {
	int id, queues, depth, chr, file;
	unsigned buf_bytes;
	int left; /* queues that are still served */
};

struct queue {
	struct device *dev;
	int index, ring, inflight;
	struct ublksrv_io_desc *descs; /* the kernel's: what each tag asks for */
	size_t descs_len;
	char *data;                                 /* ours: one buffer for each tag */
	unsigned *sq_tail, *sq_array, sq_mask, sq_new; /* of the ring, in shared memory */
	unsigned *cq_head, *cq_tail, cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
};

static int alive; /* devices that are served */

static void die(int status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "attach: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	exit(status);
}

/* --- what the program is there for ----------------------------------------------------------- */

/* Do one request; return the bytes done or a negative errno. */
static int serve(struct device *dev, const struct ublksrv_io_desc *io, char *data)
{
	size_t len = (size_t)io->nr_sectors << 9;
	off_t offset = (off_t)io->start_sector << 9;
	ssize_t done = (ssize_t)len;

	switch (ublksrv_get_op(io)) {
	case UBLK_IO_OP_READ:
		if (dev->file >= 0)
			done = pread(dev->file, data, len, offset);
		break;
	case UBLK_IO_OP_WRITE:
		if (dev->file >= 0)
			done = pwrite(dev->file, data, len, offset);
		break;
	case UBLK_IO_OP_FLUSH:
		done = dev->file >= 0 ? fdatasync(dev->file) : 0;
		break;
	default:
		return -EOPNOTSUPP;
	}
	return done < 0 ? -errno : (int)done;
}

/* --- one queue: a ring, a thread ------------------------------------------------------------- */

static void make_ring(struct queue *q)
{
	struct io_uring_params p = { 0 };
	size_t len;
	char *ring;

	q->ring = (int)syscall(__NR_io_uring_setup, q->dev->depth, &p);
	if (q->ring < 0)
		die(TEMPORARY, "io_uring_setup: %s", strerror(errno));
	/* Both rings lie in one mapping (IORING_FEAT_SINGLE_MMAP): every kernel with ublk has that. */
	len = p.cq_off.cqes + p.cq_entries * sizeof(*q->cqes);
	if (len < p.sq_off.array + p.sq_entries * sizeof(unsigned))
		len = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	ring = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, q->ring,
		    IORING_OFF_SQ_RING);
	q->sqes = mmap(NULL, p.sq_entries * sizeof(*q->sqes), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_POPULATE, q->ring, IORING_OFF_SQES);
	if (ring == MAP_FAILED || q->sqes == MAP_FAILED)
		die(TEMPORARY, "mmap of the ring: %s", strerror(errno));
	q->sq_tail = (unsigned *)(ring + p.sq_off.tail);
	q->sq_array = (unsigned *)(ring + p.sq_off.array);
	q->sq_mask = *(unsigned *)(ring + p.sq_off.ring_mask);
	q->cq_head = (unsigned *)(ring + p.cq_off.head);
	q->cq_tail = (unsigned *)(ring + p.cq_off.tail);
	q->cq_mask = *(unsigned *)(ring + p.cq_off.ring_mask);
	q->cqes = (struct io_uring_cqe *)(ring + p.cq_off.cqes);
}

/* Queue one command for a tag: fetch its first request, or answer one and fetch the next. */
static void push(struct queue *q, unsigned op, int tag, int result)
{
	unsigned tail = *q->sq_tail, index = tail & q->sq_mask;
	struct io_uring_sqe *sqe = &q->sqes[index];
	struct ublksrv_io_cmd *cmd = (struct ublksrv_io_cmd *)sqe->cmd;

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = q->dev->chr;
	sqe->cmd_op = op;
	sqe->user_data = (unsigned)tag;
	cmd->q_id = (unsigned short)q->index;
	cmd->tag = (unsigned short)tag;
	cmd->result = result;
	cmd->addr = (unsigned long)(q->data + (size_t)tag * q->dev->buf_bytes);
	q->sq_array[index] = index;
	__atomic_store_n(q->sq_tail, tail + 1, __ATOMIC_RELEASE);
	q->sq_new++;
}

static void *run_queue(void *arg)
{
	struct queue *q = arg;
	struct device *dev = q->dev;

	/* This thread and no other talks to the kernel for this queue (before Linux 6.16 it must). */
	make_ring(q);
	for (int tag = 0; tag < dev->depth; tag++)
		push(q, UBLK_U_IO_FETCH_REQ, tag, 0);
	q->inflight = dev->depth;
	/* The loop runs before END is done: requests come the moment that the last tag is fetched. */
	while (q->inflight) {
		long done = syscall(__NR_io_uring_enter, q->ring, q->sq_new, 1,
				    IORING_ENTER_GETEVENTS, NULL, 0);
		if (done < 0 && errno != EINTR)
			die(TEMPORARY, "io_uring_enter: %s", strerror(errno));
		if (done > 0)
			q->sq_new -= (unsigned)done;
		unsigned head = *q->cq_head, tail = __atomic_load_n(q->cq_tail, __ATOMIC_ACQUIRE);
		for (; head != tail; head++) {
			struct io_uring_cqe *cqe = &q->cqes[head & q->cq_mask];
			int tag = (int)cqe->user_data;
			if (cqe->res == UBLK_IO_RES_ABORT)
				q->inflight--; /* the device is being stopped */
			else if (cqe->res != UBLK_IO_RES_OK)
				die(TEMPORARY, "ublk %d queue %d tag %d: %s", dev->id, q->index,
				    tag, strerror(-cqe->res));
			else
				push(q, UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag,
				     serve(dev, &q->descs[tag],
					   q->data + (size_t)tag * dev->buf_bytes));
		}
		__atomic_store_n(q->cq_head, head, __ATOMIC_RELEASE);
	}
	/* Let go of the device, so that it can be deleted: ring, mapping, descriptor. */
	close(q->ring);
	munmap(q->descs, q->descs_len);
	if (__atomic_sub_fetch(&dev->left, 1, __ATOMIC_ACQ_REL) == 0) {
		close(dev->chr);
		if (__atomic_sub_fetch(&alive, 1, __ATOMIC_ACQ_REL) == 0)
			exit(0);
	}
	return NULL;
}

/* --- attaching ------------------------------------------------------------------------------- */

/* Find a number of the line. The plain ones stand before "params", which has its own. */
static unsigned long long number(const char *line, const char *key)
{
	char quoted[64];
	const char *found;

	snprintf(quoted, sizeof(quoted), "\"%s\":", key);
	found = strstr(line, quoted);
	if (!found)
		die(TEMPORARY, "the line has no %s: %s", quoted, line);
	return strtoull(found + strlen(quoted), NULL, 10);
}

static void attach(const char *line, const char *prefix)
{
	const unsigned long long other_ways = UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_NEED_GET_DATA |
		UBLK_F_USER_COPY | UBLK_F_ZONED | UBLK_F_AUTO_BUF_REG | UBLK_F_BATCH_IO |
		UBLK_F_IO_DESC_SIZE;
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	size_t most = UBLK_MAX_QUEUE_DEPTH * sizeof(struct ublksrv_io_desc);
	struct device *dev = calloc(1, sizeof(*dev));
	char path[4096];
	struct stat st;

	dev->id = (int)number(line, "dev_id");
	dev->queues = dev->left = (int)number(line, "queues");
	dev->depth = (int)number(line, "depth");
	dev->buf_bytes = (unsigned)number(line, "max_io_buf_bytes");
	/* Refuse, before the device is touched, what could only be served wrongly. */
	if (number(line, "flags") & other_ways)
		die(PERMANENT, "ublk %d: its flags ask for more than this program can", dev->id);
	dev->file = -1;
	if (prefix) {
		snprintf(path, sizeof(path), "%s%d", prefix, dev->id);
		dev->file = open(path, O_RDWR | O_CLOEXEC);
		if (dev->file < 0 || fstat(dev->file, &st))
			die(PERMANENT, "%s: %s", path, strerror(errno));
		if ((unsigned long long)st.st_size < number(line, "dev_sectors") << 9)
			die(PERMANENT, "%s: is smaller than ublk %d", path, dev->id);
	}
	/* START was accepted, so the kernel has let go of the old server; udev may be behind. */
	snprintf(path, sizeof(path), "/dev/ublkc%d", dev->id);
	for (int tries = 500; (dev->chr = open(path, O_RDWR | O_CLOEXEC)) < 0; usleep(10000))
		if ((errno != EBUSY && errno != ENOENT) || --tries == 0)
			die(TEMPORARY, "%s: %s", path, strerror(errno));
	__atomic_add_fetch(&alive, 1, __ATOMIC_ACQ_REL);
	for (int i = 0; i < dev->queues; i++) {
		struct queue *q = calloc(1, sizeof(*q));
		size_t each = (most + page - 1) / page * page;
		pthread_t thread;

		q->dev = dev;
		q->index = i;
		q->descs_len = (dev->depth * sizeof(*q->descs) + page - 1) / page * page;
		q->descs = mmap(NULL, q->descs_len, PROT_READ, MAP_SHARED | MAP_POPULATE, dev->chr,
				UBLKSRV_CMD_BUF_OFFSET + (off_t)(i * each));
		q->data = mmap(NULL, (size_t)dev->depth * dev->buf_bytes, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (q->descs == MAP_FAILED || q->data == MAP_FAILED)
			die(TEMPORARY, "%s: mmap of queue %d: %s", path, i, strerror(errno));
		if ((errno = pthread_create(&thread, NULL, run_queue, q)))
			die(TEMPORARY, "%s: thread of queue %d: %s", path, i, strerror(errno));
		pthread_detach(thread);
	}
}

/* As sd_notify(3). That nobody hears it is no error: ublkwatch is being restarted. */
static void say_ready(void)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	const char *name = getenv("NOTIFY_SOCKET");
	int s = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (name && s >= 0 && strlen(name) < sizeof(to.sun_path)) {
		strcpy(to.sun_path, name);
		if (name[0] == '@')
			to.sun_path[0] = 0;
		sendto(s, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&to,
		       offsetof(struct sockaddr_un, sun_path) + strlen(name));
	}
	close(s);
}

int main(int argc, char **argv)
{
	char *line = NULL;
	size_t size = 0;
	int lines = 0;

	/* Here a real server loads, connects and allocates: all that does not touch the device. */
	say_ready();
	for (; getline(&line, &size, stdin) > 0; lines++)
		attach(line, argc > 1 ? argv[1] : NULL);
	if (lines) /* no more lines come, but what is attached is served */
		pthread_exit(NULL);
	return 0; /* end of file instead of a line: not needed */
}
