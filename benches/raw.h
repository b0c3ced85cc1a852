/*
 * raw.h - a KVM guest as one writes it in C by hand: the reference of the benches.
 *
 * Nothing here shares a line with csrc/. Functions return a count or nanoseconds, or -errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_CPUID 256
#define ALIGNMENT (2 << 20) /* KVM can then map large pages, for it as for ours */

/*
 * What to run: the state of one vCPU, and `used` bytes of memory from guest address 0 on; or, with a
 * path, memory that is a private mapping of that file from `offset` on.
 */
struct raw_guest {
    uint64_t memory_size;
    uint64_t used;
    const void *image;
    const struct kvm_regs *regs;
    const struct kvm_sregs *sregs;
    const char *path;
    uint64_t offset;
};

struct raw {
    struct kvm_run *run;
    void *memory;
    size_t mapped;
    size_t run_size;
    int kvm;
    int vm;
    int vcpu;
    uint64_t sum; /* of what the guest wrote: proof that every exit was looked at */
};

static struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[MAX_CPUID];
} cpuid;

static inline int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* A constant of the host, asked once. */
static int raw_prepare(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        return -errno;
    cpuid.head.nent = MAX_CPUID;
    int error = ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) < 0 ? -errno : 0;
    close(kvm);
    return error;
}

static void raw_close(struct raw *raw)
{
    if (raw->run && raw->run != MAP_FAILED)
        munmap(raw->run, raw->run_size);
    if (raw->vcpu >= 0)
        close(raw->vcpu);
    if (raw->vm >= 0)
        close(raw->vm);
    if (raw->kvm >= 0)
        close(raw->kvm);
    if (raw->memory && raw->memory != MAP_FAILED)
        munmap(raw->memory, raw->mapped);
}

/* Read, changed, and handed over with the next KVM_RUN where KVM can do that. */
static int raw_set_registers(struct raw *raw, const struct raw_guest *guest)
{
    struct kvm_sync_regs *sync = &raw->run->s.regs;
    if (ioctl(raw->vcpu, KVM_GET_SREGS, &sync->sregs) < 0)
        return -errno;
    if (ioctl(raw->vcpu, KVM_GET_REGS, &sync->regs) < 0)
        return -errno;
    sync->sregs = *guest->sregs;
    sync->regs = *guest->regs;
    uint64_t both = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    if ((ioctl(raw->kvm, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS) & both) == both) {
        raw->run->kvm_dirty_regs = both;
        return 0;
    }
    if (ioctl(raw->vcpu, KVM_SET_SREGS, &sync->sregs) < 0)
        return -errno;
    if (ioctl(raw->vcpu, KVM_SET_REGS, &sync->regs) < 0)
        return -errno;
    return 0;
}

/* Memory for the guest, and where it begins: 0 or -errno. */
static int raw_map(struct raw *raw, const struct raw_guest *guest, uint64_t *ram)
{
    int fd = -1, flags = MAP_PRIVATE | MAP_NORESERVE;
    raw->mapped = guest->memory_size;
    if (guest->path) {
        fd = open(guest->path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -errno;
    } else {
        raw->mapped += ALIGNMENT;
        flags |= MAP_ANONYMOUS;
    }
    raw->memory = mmap(NULL, raw->mapped, PROT_READ | PROT_WRITE, flags, fd, (off_t)guest->offset);
    int error = raw->memory == MAP_FAILED ? -errno : 0;
    *ram = (uint64_t)raw->memory;
    if (fd >= 0) {
        close(fd);
    } else if (!error) {
        *ram = (*ram + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
        memcpy((void *)*ram, guest->image, guest->used);
    }
    return error;
}

/* From nothing to a vCPU that is ready to run. 0 or -errno; raw_close() either way. */
static int raw_open(struct raw *raw, const struct raw_guest *guest)
{
    *raw = (struct raw){.kvm = -1, .vm = -1, .vcpu = -1};
    raw->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (raw->kvm < 0)
        return -errno;
    if (ioctl(raw->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        return -ENOTSUP;
    int run_size = ioctl(raw->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (run_size < 0)
        return -errno;
    raw->run_size = (size_t)run_size;
    raw->vm = ioctl(raw->kvm, KVM_CREATE_VM, 0);
    if (raw->vm < 0)
        return -errno;

    uint64_t ram;
    int error = raw_map(raw, guest, &ram);
    if (error)
        return error;
    struct kvm_userspace_memory_region region = {
        .slot = 0,
        .guest_phys_addr = 0,
        .memory_size = guest->memory_size,
        .userspace_addr = ram,
    };
    if (ioctl(raw->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return -errno;

    raw->vcpu = ioctl(raw->vm, KVM_CREATE_VCPU, 0);
    if (raw->vcpu < 0)
        return -errno;
    raw->run = mmap(NULL, raw->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, raw->vcpu, 0);
    if (raw->run == MAP_FAILED)
        return -errno;
    if (ioctl(raw->vm, KVM_CHECK_EXTENSION, KVM_CAP_EXT_CPUID) <= 0)
        return -ENOTSUP;
    if (ioctl(raw->vcpu, KVM_SET_CPUID2, &cpuid) < 0)
        return -errno;
    return raw_set_registers(raw, guest);
}
