cimport cython

from finemoe.offload.hooks cimport table_fault, told
from finemoe.offload.scans cimport largest_of


cdef double NO_FLOOR


cdef class ExpertCache:
    cdef readonly object shape
    cdef readonly tuple slots
    cdef readonly int occupied, peak_occupied
    cdef readonly bytearray absent
    cdef readonly list _free
    cdef int _devices
    cdef object _keys, _evicted, _floor, _seen_keys
    cdef list _experts, _slot
    cdef bytearray _resident
    cdef int[::1] _pins, _leavers, _starts, _stops, _turn
    cdef const double[::1] _flat_keys

    cpdef int device_of(self, int place)
    cpdef bint is_resident(self, int place)
    cpdef slot(self, int place)
    cpdef bint has_room(self, int device)
    @cython.locals(victim=int, free=list)
    cpdef int reserve(self, int place, bint urgent) except? -1
    cpdef loaded(self, int place)
    cpdef abandon(self, int place)
    cpdef pin(self, int place)
    cpdef bint is_pinned(self, int place)
    cpdef unpin(self, int place)
    cdef _check_loading(self, int place)
    @cython.locals(victim=int, device=int, start=int, stop=int, floor=double, key=double)
    cdef int _victim(self, int place, bint urgent) except? -1
    cdef _take_keys(self, keys, incoming)
    cdef double _lowest(self, hook, incoming) except? -1
    @cython.locals(free=list)
    cdef _remove(self, int place)
    @cython.locals(turn=int, device=int)
    cdef bint _may_go(self, int place)
    @cython.locals(turn=int, device=int)
    cdef _let_go(self, int place)
    @cython.locals(turn=int, device=int, last=int, moved=int)
    cdef _hold(self, int place)
