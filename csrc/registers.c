/*
 * registers.c - cpu.rax, cpu.al, cpu.cf: the general registers as attributes.
 *
 * They live in the run page (KVM_CAP_SYNC_REGS).  While KVM keeps them there a read is a load and
 * a write a store; else, or where another thread runs the vCPU, Cpu.load_regs() sees to it.
 */
#include "cpython.h"

struct registers {
    PyObject_HEAD
    struct pykvm_vcpu *vcpu; /* NULL once the machine is closed */
    char entered;
};

/* What an attribute names: a whole register, or `bits` of one from bit `shift` on. */
struct part {
    const char *name;
    uint16_t offset; /* in struct kvm_regs */
    uint8_t bits;
    uint8_t shift;
};

static uint64_t mask(const struct part *part)
{
    return part->bits == 64 ? UINT64_MAX : (UINT64_C(1) << part->bits) - 1;
}

static int is_ours(const struct pykvm_vcpu *vcpu)
{
    return !vcpu->owner || vcpu->owner == PyThread_get_thread_ident();
}

/* The whole register in the run page, up to date; or NULL with an exception. */
static uint64_t *whole(PyObject *self, const struct part *part)
{
    struct pykvm_vcpu *vcpu = ((struct registers *)self)->vcpu;
    if (!vcpu || !(vcpu->run->kvm_valid_regs & KVM_SYNC_X86_REGS) || !is_ours(vcpu)) {
        PyObject *loaded = PyObject_CallMethod(self, "load_regs", NULL);
        if (!loaded)
            return NULL;
        Py_DECREF(loaded);
        vcpu = ((struct registers *)self)->vcpu;
        if (!vcpu) {
            PyErr_SetString(PyExc_RuntimeError, "registers without a vCPU: bind() it first");
            return NULL;
        }
    }
    return (uint64_t *)((char *)&vcpu->run->s.regs.regs + part->offset);
}

static void changed(PyObject *self)
{
    struct registers *registers = (struct registers *)self;
    registers->vcpu->run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    registers->entered = 1;
}

static PyObject *get(PyObject *self, void *closure)
{
    const struct part *part = closure;
    uint64_t *from = whole(self, part);
    return from ? PyLong_FromUnsignedLongLong(*from >> part->shift & mask(part)) : NULL;
}

static PyObject *get_flag(PyObject *self, void *closure)
{
    const struct part *part = closure;
    uint64_t *from = whole(self, part);
    return from ? PyBool_FromLong(*from >> part->shift & 1) : NULL;
}

/* A number that fits the part: 0, or -1 with an exception. */
static int number_of(PyObject *value, const struct part *part, uint64_t *number)
{
    if (!value) {
        PyErr_Format(PyExc_AttributeError, "%s cannot be deleted", part->name);
        return -1;
    }
    PyObject *index = PyNumber_Index(value);
    if (!index) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError))
            return -1;
        PyErr_Clear();
        PyObject *type = PyType_GetName(Py_TYPE(value));
        if (type)
            PyErr_Format(PyExc_TypeError, "%s takes an int, not %U", part->name, type);
        Py_XDECREF(type);
        return -1;
    }
    *number = PyLong_AsUnsignedLongLong(index);
    int fits = *number != UINT64_MAX || !PyErr_Occurred();
    if (!fits || *number & ~mask(part)) {
        PyErr_Clear();
        PyObject *shown = PyNumber_ToBase(index, 16);
        if (shown)
            PyErr_Format(PyExc_ValueError, "%s has %d bits: %U does not fit", part->name,
                         (int)part->bits, shown);
        Py_XDECREF(shown);
        fits = 0;
    }
    Py_DECREF(index);
    return fits ? 0 : -1;
}

/* 32 bits clear the upper half, fewer leave the rest as it is (SDM Vol. 1 §3.4.1.1). */
static int set(PyObject *self, PyObject *value, void *closure)
{
    const struct part *part = closure;
    uint64_t number;
    if (number_of(value, part, &number) < 0)
        return -1;
    uint64_t *to = whole(self, part);
    if (!to)
        return -1;
    if (part->bits < 32)
        number = number << part->shift | (*to & ~(mask(part) << part->shift));
    *to = number;
    changed(self);
    return 0;
}

static int set_flag(PyObject *self, PyObject *value, void *closure)
{
    const struct part *part = closure;
    int on = value ? PyObject_IsTrue(value) : -1;
    if (on < 0) {
        if (!value)
            PyErr_Format(PyExc_AttributeError, "%s cannot be deleted", part->name);
        return -1;
    }
    uint64_t *to = whole(self, part);
    if (!to)
        return -1;
    *to = (*to & ~(UINT64_C(1) << part->shift)) | (uint64_t)on << part->shift;
    changed(self);
    return 0;
}

#define PART(NAME, WHOLE, BITS, SHIFT)                                                            \
    {NAME, get, set, "The register " NAME ".",                                                    \
     &(struct part){NAME, offsetof(struct kvm_regs, WHOLE), BITS, SHIFT}}
#define FLAG(NAME, BIT)                                                                           \
    {NAME, get_flag, set_flag, "Bit " #BIT " of RFLAGS, as a bool.",                              \
     &(struct part){NAME, offsetof(struct kvm_regs, rflags), 1, BIT}}
#define FOUR(WHOLE, R64, R32, R16, R8)                                                            \
    PART(R64, WHOLE, 64, 0), PART(R32, WHOLE, 32, 0), PART(R16, WHOLE, 16, 0), PART(R8, WHOLE, 8, 0)
#define NUMBERED(R) FOUR(R, #R, #R "d", #R "w", #R "b")

static PyGetSetDef parts[] = {
    FOUR(rax, "rax", "eax", "ax", "al"),
    FOUR(rbx, "rbx", "ebx", "bx", "bl"),
    FOUR(rcx, "rcx", "ecx", "cx", "cl"),
    FOUR(rdx, "rdx", "edx", "dx", "dl"),
    FOUR(rsi, "rsi", "esi", "si", "sil"),
    FOUR(rdi, "rdi", "edi", "di", "dil"),
    FOUR(rsp, "rsp", "esp", "sp", "spl"),
    FOUR(rbp, "rbp", "ebp", "bp", "bpl"),
    NUMBERED(r8),
    NUMBERED(r9),
    NUMBERED(r10),
    NUMBERED(r11),
    NUMBERED(r12),
    NUMBERED(r13),
    NUMBERED(r14),
    NUMBERED(r15),
    PART("ah", rax, 8, 8),
    PART("bh", rbx, 8, 8),
    PART("ch", rcx, 8, 8),
    PART("dh", rdx, 8, 8),
    PART("rip", rip, 64, 0),
    PART("eip", rip, 32, 0),
    PART("ip", rip, 16, 0),
    PART("rflags", rflags, 64, 0),
    PART("eflags", rflags, 32, 0),
    PART("flags", rflags, 16, 0),
    FLAG("cf", 0),
    FLAG("pf", 2),
    FLAG("af", 4),
    FLAG("zf", 6),
    FLAG("sf", 7),
    FLAG("tf", 8),
    FLAG("interrupts", 9),
    FLAG("df", 10),
    FLAG("of", 11),
    {0},
};

/* bind(address): the struct pykvm_vcpu that the registers belong to; 0 to let go of it. */
static PyObject *bind(PyObject *self, PyObject *address)
{
    void *vcpu = PyLong_AsVoidPtr(address);
    if (!vcpu && PyErr_Occurred())
        return NULL;
    ((struct registers *)self)->vcpu = vcpu;
    Py_RETURN_NONE;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self); /* Cpu: Python's part of it is gone already */
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"bind", bind, METH_O, "bind(vcpu): the struct pykvm_vcpu at this address, or 0 for none"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"entered", T_BOOL, offsetof(struct registers, entered), 0,
     "Whether enter() or a register write made it ready to run."},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The general registers of a vCPU, RIP and RFLAGS, whole and in parts."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, parts},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "pykvm._abi._cpython.GeneralRegisters",
    .basicsize = sizeof(struct registers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

int pykvm_registers_add(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    int error = type ? PyModule_AddObjectRef(module, "GeneralRegisters", type) : -1;
    Py_XDECREF(type);
    return error;
}
