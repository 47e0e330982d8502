cimport cython

from finemoe.offload.cache cimport ExpertCache
from finemoe.offload.wishes cimport WishList


@cython.final
@cython.no_gc
@cython.freelist(16)
cdef class Chunk:
    cdef readonly int place
    cdef readonly object slot
    cdef readonly long long start, stop
    cdef readonly bint urgent


@cython.final
@cython.no_gc
@cython.freelist(16)
cdef class _Transfer:
    cdef readonly int place
    cdef readonly object slot
    cdef readonly double priority
    cdef readonly long long sent
    cdef long long done, prefetched
    cdef readonly bint urgent, cancelled

    cpdef bint in_flight(self)
    cdef bint yields_to(self, double priority, int place)


@cython.locals(chunk=Chunk)
cdef Chunk _chunk(_Transfer transfer, long long start, long long stop)

@cython.locals(transfer=_Transfer)
cdef _Transfer _transfer(int place, bint urgent, double priority)


cdef class TransferQueue:
    cdef readonly bint starved
    cdef ExpertCache _cache
    cdef WishList _wishes
    cdef long long _expert_bytes, _chunk_bytes, _prefetched, _on_demand, _wasted
    cdef int _per_layer, _devices
    cdef list _transfers, _under_way, _urgent
    cdef long long[::1] _unused

    cpdef bint settled(self)
    cpdef bint retry(self)
    @cython.locals(transfer=_Transfer)
    cpdef bint requested(self, int place)
    @cython.locals(transfer=_Transfer)
    cpdef prefetch(self, int place, double priority)
    @cython.locals(transfer=_Transfer, priority=double)
    cpdef bint prefetch_all(self, const double[::1] table, int layer)
    cdef _prefetch_again(self, _Transfer transfer, double priority)
    @cython.locals(transfer=_Transfer)
    cpdef demand(self, int place)
    @cython.locals(transfer=_Transfer)
    cpdef cancel(self, int place)
    @cython.locals(transfer=_Transfer, place=int)
    cpdef cancel_layer(self, int layer, but)
    cpdef Chunk next_chunk(self)
    cpdef Chunk next_span(self)
    @cython.locals(transfer=_Transfer)
    cpdef cut(self, Chunk span, long long stop)
    @cython.locals(transfer=_Transfer, best=int)
    cpdef bint gives_way(self, Chunk span)
    @cython.locals(transfer=_Transfer, start=cython.longlong, stop=cython.longlong)
    cdef Chunk _next(self, long long at_most)
    @cython.locals(transfer=_Transfer)
    cpdef bint chunk_done(self, Chunk chunk)
    cpdef used(self, int place)
    @cython.locals(transfer=_Transfer, first=_Transfer)
    cdef _Transfer _next_urgent(self)
    @cython.locals(transfer=_Transfer, begun=_Transfer, place=int)
    cdef _Transfer _next_prefetch(self)
    @cython.locals(transfer=_Transfer)
    cdef bint _copying(self)
    @cython.locals(evicted=int)
    cdef bint _take_slot(self, _Transfer transfer)
    cdef _begin(self, _Transfer transfer)
    @cython.locals(under_way=list, at=int)
    cdef _end(self, _Transfer transfer)
    cdef _drop(self, _Transfer transfer)
