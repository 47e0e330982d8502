cimport cython

from finemoe.offload.table cimport Table


cdef double TICK


cdef class Recency:
    cdef public object shape
    cdef readonly object _recency
    cdef readonly double _now
    cdef readonly int _spared
    cdef Table _table, _aside

    @cython.locals(layer=int, index=int)
    cpdef on_outcome(self, outcome)
    cpdef on_load(self, expert)
    cpdef note_load(self, int layer, int index)
    cdef _touch(self, int layer, int index)
