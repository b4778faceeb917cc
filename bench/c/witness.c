/*
 * The witness: sees every contestant by the same means, and belongs to none.
 *
 *     witness [--read]         --read: beside, the first device is read from all the time
 *
 * Commands on standard input, each for all devices of a round; it answers each with a line:
 *
 *     arm dev:pid ...     the devices, and the servers they have; "armed" once reads complete
 *     kill                SIGKILL to those servers, then as watch
 *     watch SECONDS       until all devices are LIVE under another server: JSON, with the moments
 *
 * GET_DEV_INFO, which takes no lock, is asked for all of them at once, again after nine times the
 * CPU time of that, and half a millisecond at least: so it takes a tenth of one CPU at most.
 */
#include "ring.h"
#include <pthread.h>

static int dev_ids[MOST], count;
static pid_t pids[MOST];
static struct ublksrv_ctrl_dev_info infos[MOST];
static double quiesced[MOST], live[MOST];

/* --- a program that reads from the disk ------------------------------------------------------ */

static struct {
	pthread_t thread;
	int fd, stop;
	long done;            /* reads that completed */
	int failed;           /* errno of the first that did not */
	double longest, when; /* of all reads since it began, in seconds; and when that completed */
} reader;

static void *read_on(void *unused)
{
	void *page;

	(void)unused;
	if (posix_memalign(&page, 4096, 4096))
		die("memory");
	while (!__atomic_load_n(&reader.stop, __ATOMIC_ACQUIRE)) {
		double began = now(), ended;

		if (pread(reader.fd, page, 4096, 0) != 4096 && !reader.failed)
			reader.failed = errno ? errno : EIO;
		ended = now();
		if (ended - began > reader.longest) {
			reader.longest = ended - began;
			reader.when = ended;
		}
		__atomic_add_fetch(&reader.done, 1, __ATOMIC_RELEASE);
		nap(0.002);
	}
	free(page);
	return NULL;
}

static void begin_reading(void)
{
	char path[64];

	snprintf(path, sizeof path, "/dev/ublkb%d", dev_ids[0]);
	memset(&reader, 0, sizeof reader);
	reader.fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (reader.fd < 0)
		die("%s", path);
	if (pthread_create(&reader.thread, NULL, read_on, NULL))
		die("a thread");
	while (__atomic_load_n(&reader.done, __ATOMIC_ACQUIRE) < 3)
		nap(0.002);
	reader.longest = 0; /* whatever was first is no stall of this round */
}

/* The read that the kill held up has completed once another one, begun later, has. */
static void end_reading(double deadline)
{
	long done = __atomic_load_n(&reader.done, __ATOMIC_ACQUIRE);

	while (__atomic_load_n(&reader.done, __ATOMIC_ACQUIRE) < done + 2) {
		if (now() > deadline) {
			errno = ETIMEDOUT;
			die("reads of /dev/ublkb%d", dev_ids[0]);
		}
		nap(0.001);
	}
	__atomic_store_n(&reader.stop, 1, __ATOMIC_RELEASE);
	pthread_join(reader.thread, NULL);
	close(reader.fd);
}

/* --- the devices ----------------------------------------------------------------------------- */

/* Ask for those that are not LIVE again; returns how many there still are. */
static int look(struct ring *ring)
{
	int asked[MOST], results[MOST], left = 0;
	unsigned number = 0;
	double at;

	for (int i = 0; i < count; i++) {
		if (live[i])
			continue;
		push(ring, UBLK_U_CMD_GET_DEV_INFO, dev_ids[i], &infos[i], sizeof infos[i], 0, number);
		asked[number++] = i;
	}
	answers(ring, number, results);
	at = now();
	for (unsigned n = 0; n < number; n++) {
		int i = asked[n];

		if (results[n] < 0) {
			errno = -results[n];
			die("GET_DEV_INFO %d", dev_ids[i]);
		}
		if (infos[i].state != UBLK_S_DEV_LIVE && infos[i].state != UBLK_S_DEV_DEAD && !quiesced[i])
			quiesced[i] = at;
		if (infos[i].state == UBLK_S_DEV_LIVE && infos[i].ublksrv_pid != pids[i] &&
		    infos[i].ublksrv_pid > 0)
			live[i] = at;
		left += !live[i];
	}
	return left;
}

static void watch(struct ring *ring, double killed, double seconds, int reading)
{
	double deadline = now() + seconds;
	int left;

	do {
		double before = spent(), pause;

		left = look(ring);
		pause = (spent() - before) * 9;
		if (left)
			nap(pause > 0.0005 ? pause : 0.0005);
	} while (left && now() < deadline);
	if (reading && !left)
		end_reading(deadline);
	printf("{\"killed\": %.6f, \"late\": %d, \"devices\": {", killed, left);
	for (int i = 0; i < count; i++)
		printf("%s\"%d\": {\"quiesced\": %.6f, \"live\": %.6f, \"pid\": %d}", i ? ", " : "",
		       dev_ids[i], quiesced[i], live[i], infos[i].ublksrv_pid);
	printf("}");
	if (reading && !left)
		printf(", \"io\": %.6f, \"stall\": %.6f, \"io_errno\": %d", reader.when, reader.longest,
		       reader.failed);
	printf("}\n");
	fflush(stdout);
	if (left)
		exit(3); /* the reader may hang with its device */
}

int main(int argc, char **argv)
{
	int reading = argc > 1 && !strcmp(argv[1], "--read");
	static char line[MOST * 24];
	double killed = 0, seconds;
	struct ring ring;

	ring_open(&ring, MOST);
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "arm ", 4)) {
			count = pairs(line + 4, dev_ids, pids);
			memset(quiesced, 0, sizeof quiesced);
			memset(live, 0, sizeof live);
			killed = 0;
			if (reading)
				begin_reading();
			printf("armed\n");
			fflush(stdout);
		} else if (!strncmp(line, "kill", 4)) {
			killed = kill_all(pids, count);
		} else if (sscanf(line, "watch %lf", &seconds) == 1) {
			watch(&ring, killed, seconds, reading);
		} else {
			die("not a command: %s", line);
		}
	}
	return 0;
}
