/*
 * The oracle in C: what bench/oracle.py does, by the same steps, without Python's cost.
 *
 *     oracle managed|group|delegated WIDTH HOME COMMAND...
 *
 * {dev_id} in COMMAND is replaced. Commands on standard input, one a line:
 *
 *     device N LINE       what the server of device N is to be told (the attach contract)
 *     go dev:pid ...      kill these servers and recover from it; answered with JSON, one line
 *
 * It has a thread for each device. At most WIDTH servers are started at a time; a turn ends when
 * the server is READY, as ublkwatch's does. START is sent every millisecond until it is accepted,
 * while the server starts; its line is written when both are done, and END right behind it.
 */
#include "ring.h"
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { MANAGED, GROUP, DELEGATED };

struct server {
	pid_t pid;
	int notify, line_fd; /* where it says READY, and where its lines go */
	pthread_mutex_t lock;
	pthread_cond_t up;
	int ready;
};

struct device {
	int id;
	char *line;
	struct ring ring;
	struct server *server;
	int first; /* of its server's devices: it starts the server */
	double spawned, accepted, ready, line_at, ended;
	pthread_t thread;
};

extern char **environ;
static int mode, devices_known;
static const char *home;
static char **command;
static sem_t turns;
static struct device devices[MOST];
static struct server servers[MOST];

static struct device *device(int id)
{
	for (int i = 0; i < devices_known; i++)
		if (devices[i].id == id)
			return &devices[i];
	errno = ENODEV;
	die("device %d", id);
	return NULL;
}

static char *filled(const char *word, int id)
{
	const char *at = strstr(word, "{dev_id}");
	char *result;

	if (!at)
		return strdup(word);
	if (asprintf(&result, "%.*s%d%s", (int)(at - word), word, id, at + 8) < 0)
		die("memory");
	return result;
}

static int listen_at(struct server *server, const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	unlink(path);
	server->notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return bind(server->notify, (struct sockaddr *)&address, sizeof address);
}

static void start(struct server *server, int id)
{
	char path[108], notify[128], log[128], *argv[64], *environment[256];
	posix_spawn_file_actions_t files;
	posix_spawnattr_t how;
	sigset_t defaults;
	int ends[2], words = 0, variables = 0, error;

	close(server->notify);
	close(server->line_fd);
	server->ready = 0;
	snprintf(path, sizeof path, "%s/notify-%d", home, id);
	snprintf(notify, sizeof notify, "NOTIFY_SOCKET=%s", path);
	snprintf(log, sizeof log, "%s/server-%d.log", home, id);
	if (listen_at(server, path) || pipe2(ends, O_CLOEXEC))
		die("%s", path);
	for (; command[words] && words < 63; words++)
		argv[words] = filled(command[words], id);
	argv[words] = NULL;
	for (char **each = environ; *each && variables < 254; each++)
		environment[variables++] = *each;
	environment[variables++] = notify;
	environment[variables] = NULL;
	posix_spawn_file_actions_init(&files);
	posix_spawn_file_actions_adddup2(&files, ends[0], 0);
	posix_spawn_file_actions_addopen(&files, 1, log, O_WRONLY | O_CREAT | O_APPEND, 0600);
	posix_spawn_file_actions_adddup2(&files, 1, 2);
	posix_spawnattr_init(&how);
	sigemptyset(&defaults);
	sigaddset(&defaults, SIGCHLD);
	posix_spawnattr_setsigdefault(&how, &defaults);
	posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSIGDEF);
	error = posix_spawnp(&server->pid, argv[0], &files, &how, argv, environment);
	if (error) {
		errno = error;
		die("%s", argv[0]);
	}
	posix_spawn_file_actions_destroy(&files);
	posix_spawnattr_destroy(&how);
	close(ends[0]);
	server->line_fd = ends[1];
	while (words)
		free(argv[--words]);
}

/* Hear what a server has to say for so long, in ms; -1: until it is READY. */
static void hear(struct server *server, int ms)
{
	struct pollfd heard = { .fd = server->notify, .events = POLLIN };
	char text[256];
	ssize_t length;

	do {
		if (poll(&heard, 1, ms) <= 0)
			return;
		length = recv(server->notify, text, sizeof text - 1, 0);
		if (length < 0)
			die("NOTIFY_SOCKET");
		text[length] = 0;
		if (strstr(text, "READY=1")) {
			pthread_mutex_lock(&server->lock);
			server->ready = 1;
			pthread_cond_broadcast(&server->up);
			pthread_mutex_unlock(&server->lock);
		}
	} while (!server->ready && ms < 0);
}

static void *recover(void *argument)
{
	struct device *d = argument;
	struct server *server = d->server;
	int result;

	if (d->first) {
		sem_wait(&turns);
		start(server, d->id);
		d->spawned = now();
		if (mode == DELEGATED) {
			sem_post(&turns);
			return NULL;
		}
	}
	while ((result = control(&d->ring, UBLK_U_CMD_START_USER_RECOVERY, d->id, NULL, 0, 0)) == -EBUSY) {
		if (d->first && !server->ready)
			hear(server, 1);
		else
			nap(0.001);
	}
	if (result) {
		errno = -result;
		die("START_USER_RECOVERY %d", d->id);
	}
	d->accepted = now();
	if (d->first) {
		if (!server->ready)
			hear(server, -1);
		sem_post(&turns);
	}
	pthread_mutex_lock(&server->lock);
	while (!server->ready)
		pthread_cond_wait(&server->up, &server->lock);
	pthread_mutex_unlock(&server->lock);
	d->ready = now();
	if (write(server->line_fd, d->line, strlen(d->line)) < 0) /* whole: it is less than PIPE_BUF */
		die("the line");
	d->line_at = now();
	result = control(&d->ring, UBLK_U_CMD_END_USER_RECOVERY, d->id, NULL, 0, (__u64)server->pid);
	if (result) {
		errno = -result;
		die("END_USER_RECOVERY %d", d->id);
	}
	d->ended = now();
	return NULL;
}

static void go(char *words)
{
	static int dev_ids[MOST];
	static pid_t pids[MOST];
	int count = pairs(words, dev_ids, pids);
	double killed;

	for (int i = 0; i < count; i++) {
		struct device *d = device(dev_ids[i]);

		d->first = mode != GROUP || i == 0;
		d->server = &servers[mode == GROUP ? 0 : d - devices];
		if (d->first)
			d->server->ready = 0;
	}
	killed = kill_all(pids, count);
	for (int i = 0; i < count; i++)
		if (pthread_create(&device(dev_ids[i])->thread, NULL, recover, device(dev_ids[i])))
			die("a thread");
	for (int i = 0; i < count; i++)
		pthread_join(device(dev_ids[i])->thread, NULL);
	printf("{\"killed\": %.6f, \"devices\": {", killed);
	for (int i = 0; i < count; i++) {
		struct device *d = device(dev_ids[i]);

		printf("%s\"%d\": {\"accepted\": %.6f, \"ready\": %.6f, \"line\": %.6f, \"ended\": %.6f, "
		       "\"pid\": %d}", i ? ", " : "", d->id, d->accepted, d->ready, d->line_at, d->ended,
		       d->server->pid);
	}
	printf("}}\n");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static char line[MOST * 24 + 8192];
	int id, at;

	if (argc < 5) {
		errno = EINVAL;
		die("oracle managed|group|delegated WIDTH HOME COMMAND...");
	}
	mode = !strcmp(argv[1], "group") ? GROUP : !strcmp(argv[1], "delegated") ? DELEGATED : MANAGED;
	sem_init(&turns, 0, (unsigned)atoi(argv[2]));
	home = argv[3];
	command = argv + 4;
	signal(SIGCHLD, SIG_IGN); /* nobody waits for a server */
	for (int i = 0; i < MOST; i++) {
		pthread_mutex_init(&servers[i].lock, NULL);
		pthread_cond_init(&servers[i].up, NULL);
		servers[i].notify = servers[i].line_fd = -1;
	}
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "device %d %n", &id, &at) == 1) {
			if (devices_known == MOST)
				die("too many devices");
			devices[devices_known].line = strdup(line + at); /* with its end of line */
			ring_open(&devices[devices_known].ring, 4);
			devices[devices_known++].id = id;
		} else if (!strncmp(line, "go ", 3)) {
			go(line + 3);
		} else {
			die("not a command: %s", line);
		}
	}
	return 0;
}
