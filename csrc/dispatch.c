/* dispatch.c - an access for Python: it becomes an object, and its handler is called. */
#include "cpython.h"

#include <stdio.h>

/* ---- PioAccess, MmioAccess ------------------------------------------------------------------- */

struct access {
    PyObject_HEAD
    unsigned long long address;
    unsigned long long value;
    unsigned long long offset;
    unsigned char size;
    char is_write;
};

static PyTypeObject *types[2]; /* by is_mmio */

static struct access *make(PyTypeObject *type)
{
    return (struct access *)PyType_GenericAlloc(type, 0);
}

static PyObject *access_of(const struct pykvm_access *from)
{
    struct access *access = make(types[from->is_mmio]);
    if (!access)
        return NULL;
    access->address = from->address;
    access->value = from->value;
    access->offset = from->offset;
    access->size = from->size;
    access->is_write = (char)from->is_write;
    return (PyObject *)access;
}

static PyObject *access_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"address", "size", "value", "is_write", "offset", NULL};
    struct access *access = make(type);
    if (!access)
        return NULL;
    int is_write = 0;
    access->size = 1;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "K|bKpK", names, &access->address,
                                     &access->size, &access->value, &is_write, &access->offset)) {
        Py_DECREF(access);
        return NULL;
    }
    if (access->size < 1 || access->size > sizeof access->value) {
        PyErr_Format(PyExc_ValueError, "an access is 1..8 bytes wide, not %d", (int)access->size);
        Py_DECREF(access);
        return NULL;
    }
    access->is_write = (char)is_write;
    return (PyObject *)access;
}

static void access_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *access_data(PyObject *self, void *closure)
{
    struct access *access = (struct access *)self; /* x86 is little endian, and so is this host */
    (void)closure;
    return PyBytes_FromStringAndSize((char *)&access->value, access->is_write ? access->size : 0);
}

static PyObject *format(PyObject *self, const char *write, const char *read)
{
    struct access *access = (struct access *)self;
    char text[96];
    if (access->is_write)
        snprintf(text, sizeof text, "<%s %#llx, 0x%0*llx>", write, access->address,
                 2 * access->size, access->value);
    else
        snprintf(text, sizeof text, "<%s %#llx, %u byte%s>", read, access->address, access->size,
                 access->size == 1 ? "" : "s");
    return PyUnicode_FromString(text);
}

static PyObject *pio_repr(PyObject *self)
{
    return format(self, "out", "in");
}

static PyObject *mmio_repr(PyObject *self)
{
    return format(self, "store", "load");
}

#define FIELD(NAME, TYPE, FIELD, DOC) {NAME, TYPE, offsetof(struct access, FIELD), READONLY, DOC}
#define COMMON                                                                                    \
    FIELD("value", T_ULONGLONG, value, "What the guest writes, unsigned; 0 for a read."),         \
        FIELD("offset", T_ULONGLONG, offset, "Bytes from the first address of the claimed range."), \
        FIELD("size", T_UBYTE, size, "Width in bytes: 1, 2, 4; MMIO any of 1..8."),               \
        FIELD("is_write", T_BOOL, is_write, "False for IN and loads, which the handler answers.")

static PyMemberDef pio_members[] = {
    FIELD("port", T_ULONGLONG, address, "The port, 0..0xffff."),
    COMMON,
    {0},
};

static PyMemberDef mmio_members[] = {
    FIELD("gpa", T_ULONGLONG, address, "The guest-physical address."),
    COMMON,
    {0},
};

static PyGetSetDef properties[] = {
    {"data", access_data, NULL, "The written bytes, little endian; b\"\" for a read.", NULL},
    {0},
};

static PyType_Slot pio_slots[] = {
    {Py_tp_doc, "An access to an I/O port, as the guest made it: a value, which may be kept."},
    {Py_tp_new, access_new},
    {Py_tp_dealloc, access_dealloc},
    {Py_tp_repr, pio_repr},
    {Py_tp_members, pio_members},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Slot mmio_slots[] = {
    {Py_tp_doc, "An access to guest-physical memory that is not RAM: a value, which may be kept."},
    {Py_tp_new, access_new},
    {Py_tp_dealloc, access_dealloc},
    {Py_tp_repr, mmio_repr},
    {Py_tp_members, mmio_members},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec pio_spec = {
    .name = "pykvm.devices.access.PioAccess",
    .basicsize = sizeof(struct access),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pio_slots,
};

static PyType_Spec mmio_spec = {
    .name = "pykvm.devices.access.MmioAccess",
    .basicsize = sizeof(struct access),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = mmio_slots,
};

/* ---- calling handlers ------------------------------------------------------------------------ */

/* An exception about an answer: `format` takes the place, an object and the access's size. */
static int refuse(const struct pykvm_access *access, PyObject *kind, const char *format,
                  PyObject *shown)
{
    char where[32];
    snprintf(where, sizeof where, "%#llx", (unsigned long long)access->address);
    if (shown)
        PyErr_Format(kind, format, where, shown, access->size, access->size == 1 ? "" : "s");
    Py_XDECREF(shown);
    return -1;
}

static int take_int(const struct pykvm_access *access, PyObject *answer, uint64_t *value)
{
    int overflow = 0, fits = 0;
    long long number = PyLong_AsLongLongAndOverflow(answer, &overflow);
    *value = (uint64_t)number;
    if (!overflow) {
        fits = number == -1 || (number >= 0 && (access->size >= 8 || !(number >> 8 * access->size)));
    } else if (overflow > 0 && access->size >= 8) {
        *value = PyLong_AsUnsignedLongLong(answer);
        fits = !PyErr_Occurred();
        PyErr_Clear();
    }
    if (fits)
        return 0;
    return refuse(access, PyExc_ValueError,
                  "the handler at %s answered %U, which does not fit the %d byte%s of the read",
                  PyNumber_ToBase(answer, 16));
}

/* A handler's answer as a number of the access's width: 0, or -1 with an exception. */
static int take_answer(const struct pykvm_access *access, PyObject *answer, uint64_t *value)
{
    if (answer == Py_None) {
        *value = PYKVM_ALL_ONES;
        return 0;
    }
    if (PyLong_Check(answer))
        return take_int(access, answer, value);
    PyObject *index = PyNumber_Index(answer); /* another integer: NumPy's, say */
    if (!index) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError))
            return -1;
        PyErr_Clear();
        return refuse(access, PyExc_TypeError,
                      "the handler at %s must answer a read with an int or None, not %U",
                      PyType_GetName(Py_TYPE(answer)));
    }
    int status = take_int(access, index, value);
    Py_DECREF(index);
    return status;
}

/* The handler's answer to the access of a vCPU that waits for one: 0, or -1 with an exception. */
static int ask(struct pykvm_vcpu *vcpu, PyObject *handlers, PyObject *call, uint64_t *value)
{
    /* A signal that came while C ran: Python's handler of it may raise, and nobody has seen the
       access yet, so the next run hands it out again.  Or it gives the vCPU a new state, and the
       access is given up. */
    vcpu->access.pending = PYKVM_RETRY;
    if (PyErr_CheckSignals() < 0)
        return -1;
    if (vcpu->access.pending != PYKVM_RETRY)
        return 0;
    int status = -1;
    PyObject *access = access_of(&vcpu->access);
    PyObject *handler = PySequence_GetItem(handlers, vcpu->access.slot); /* a reference of its own */
    if (access && handler) {
        vcpu->access.pending = PYKVM_ASKED;
        PyObject *answer = call == Py_None
                               ? PyObject_CallFunctionObjArgs(handler, access, NULL)
                               : PyObject_CallFunctionObjArgs(call, handler, access, NULL);
        int is_waiting = vcpu->access.pending == PYKVM_ASKED && !vcpu->access.is_write;
        if (answer)
            status = is_waiting ? take_answer(&vcpu->access, answer, value) : 0;
        Py_XDECREF(answer);
    }
    Py_XDECREF(handler);
    Py_XDECREF(access);
    return status;
}

static struct pykvm_vcpu *vcpu_at(PyObject *address)
{
    return (struct pykvm_vcpu *)PyLong_AsVoidPtr(address);
}

static PyObject *run(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "run(vcpu, handlers, call)");
        return NULL;
    }
    struct pykvm_vcpu *vcpu = vcpu_at(arguments[0]);
    if (!vcpu)
        return NULL;
    uint64_t answer = PYKVM_ALL_ONES;
    for (;;) {
        int64_t outcome;
        Py_BEGIN_ALLOW_THREADS
        outcome = pykvm_vcpu_answer(vcpu, answer);
        Py_END_ALLOW_THREADS
        if (outcome != PYKVM_ACCESS)
            return PyLong_FromLongLong(outcome);
        if (ask(vcpu, arguments[1], arguments[2], &answer) < 0)
            return NULL;
    }
}

static PyObject *last_access(PyObject *self, PyObject *address)
{
    (void)self;
    struct pykvm_vcpu *vcpu = vcpu_at(address);
    return vcpu ? access_of(&vcpu->access) : NULL;
}

static PyMethodDef functions[] = {
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL,
     "run(vcpu, handlers, call) -> outcome, any but PYKVM_ACCESS\n\n"
     "Run the vCPU at the address `vcpu` and have handlers[slot](access), or if `call` is not None\n"
     "call(handlers[slot], access), serve its accesses. What a handler raises comes through."},
    {"last_access", last_access, METH_O, "last_access(vcpu) -> the access that the vCPU at this address made"},
    {NULL, NULL, 0, NULL},
};

int pykvm_dispatch_add(PyObject *module)
{
    PyType_Spec *specs[] = {&pio_spec, &mmio_spec};
    for (int i = 0; i < 2; i++) {
        types[i] = (PyTypeObject *)PyType_FromSpec(specs[i]);
        if (!types[i] || PyModule_AddObjectRef(module, i ? "MmioAccess" : "PioAccess",
                                               (PyObject *)types[i]) < 0)
            return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
