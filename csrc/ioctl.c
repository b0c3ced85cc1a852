/* ioctl(2) with the error in the result. SPDX-License-Identifier: MIT */
#include "pykvm.h"

#include <errno.h>
#include <sys/ioctl.h>

int64_t pykvm_ioctl(int fd, unsigned long request, void *arg)
{
	int result = ioctl(fd, request, arg);

	return result < 0 ? -errno : result;
}
