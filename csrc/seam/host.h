/* seam/host.h - what Python's os module has not: ioctls, run pages, block devices. */
#ifndef PYKVM_SEAM_HOST_H
#define PYKVM_SEAM_HOST_H

#include <stdint.h>

/* cdef: begin */

/* One ioctl: its result (>= 0), or -errno.  EINTR is not retried: signals must reach Python. */
int64_t pykvm_ioctl(int fd, unsigned long request, void *arg);

/* Map the pages that a vCPU's file descriptor shares: NULL, and errno, on failure. */
struct kvm_run *pykvm_run_map(int fd, uint64_t size);
void pykvm_run_unmap(struct kvm_run *run, uint64_t size);

/* ---- disks (disk.c) -------------------------------------------------------------------------- */

/* What a block device says of itself, in bytes; see queue-sysfs in the kernel's documentation. */
struct pykvm_block_limits {
    uint64_t size;
    uint32_t logical;   /* the least that is read or written */
    uint32_t physical;  /* the least that is written without reading first */
    uint32_t min_io;    /* preferred least size, or 0 */
    uint32_t opt_io;    /* preferred size, or 0 */
    uint32_t alignment; /* where the first physical block begins */
};
int pykvm_block_limits(int fd, struct pykvm_block_limits *limits);
/* Forget a range of a block device; what is read there afterwards may be anything. */
int pykvm_block_discard(int fd, int64_t offset, int64_t length);
/* Give a range of a file or block device back to the host; it reads as zeros. */
int pykvm_file_punch(int fd, int64_t offset, int64_t length);
/* Make a range zeros and keep its space. */
int pykvm_file_zero(int fd, int64_t offset, int64_t length);

/* cdef: end */

#endif
