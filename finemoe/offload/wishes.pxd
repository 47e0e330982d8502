cimport cython

from finemoe.offload.scans cimport largest


cdef int NOWHERE, STALE
cdef double NONE


cdef class WishList:
    cdef readonly double highest
    cdef int _per_layer, _devices, _device, _best, _search_from
    cdef double[::1] _priorities

    cpdef int best(self)
    cpdef bint wished(self, int place)
    @cython.locals(position=int, best=int, known=int)
    cpdef put(self, int place, double priority)
    @cython.locals(start=int, position=int, place=int, priority=double)
    cpdef bint put_all(self, const double[::1] table, bytearray marks, int layer)
    @cython.locals(position=int)
    cpdef drop(self, int place)
    @cython.locals(start=int, stop=int)
    cpdef drop_layer(self, int layer)
    cdef int _first_from(self, int layer)
    cdef _lose_best(self, int first)
    @cython.locals(priorities="double[::1]", first=int, best=int, before=int)
    cdef _look_up(self)
