/* pykvm.h: the seam between Python and C. SPDX-License-Identifier: MIT */
#ifndef PYKVM_H
#define PYKVM_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */

/* ioctl(2): its result, or -errno. EINTR is not retried. */
int64_t pykvm_ioctl(int fd, unsigned long request, void *arg);

/* cdef: end */

#endif
