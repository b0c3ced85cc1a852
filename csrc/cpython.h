/*
 * cpython.h - the little of our C that is written against CPython itself (its stable ABI): what
 * runs on every exit that Python serves. After an exit the caches and the branch predictor are
 * cold, and each bytecode dear.
 */
#ifndef PYKVM_CPYTHON_H
#define PYKVM_CPYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "pykvm.h"

/* Add to the module pykvm._abi._cpython: 0, or -1 with an exception. */
int pykvm_dispatch_add(PyObject *module);  /* run(), last_access(), PioAccess, MmioAccess */
int pykvm_registers_add(PyObject *module); /* GeneralRegisters */

#endif
