/* `list N...`: one line for each device, with the name of its state, as every ublk tool has it. */
#include "ring.h"

int main(int argc, char **argv)
{
	static const char *const names[] = { "DEAD", "LIVE", "QUIESCED", "FAIL_IO" };
	struct ring ring;

	ring_open(&ring, 4);
	for (int i = 1; i < argc; i++) {
		struct ublksrv_ctrl_dev_info info;
		int result = control(&ring, UBLK_U_CMD_GET_DEV_INFO, atoi(argv[i]), &info, sizeof info, 0);

		if (result == 0)
			printf("dev id %s: state %s pid %d\n", argv[i], info.state < 4 ? names[info.state] : "?",
			       info.ublksrv_pid);
	}
	return 0;
}
