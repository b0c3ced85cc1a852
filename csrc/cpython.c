/* cpython.c - the module pykvm._abi._cpython. */
#include "cpython.h"

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "pykvm._abi._cpython",
    .m_doc = "What of csrc/ is written against CPython itself.",
    .m_size = -1,
};

/* The compiled file is cffi's module; this one enters sys.modules by a call of its function. */
int pykvm_cpython_init(void)
{
    PyGILState_STATE state = PyGILState_Ensure(); /* cffi let go of it */
    PyObject *module = PyModule_Create(&definition);
    int error = !module || pykvm_dispatch_add(module) || pykvm_registers_add(module) ||
                PyDict_SetItemString(PyImport_GetModuleDict(), definition.m_name, module);
    if (error)
        PyErr_WriteUnraisable(NULL);
    Py_XDECREF(module);
    PyGILState_Release(state);
    return error ? -1 : 0;
}
