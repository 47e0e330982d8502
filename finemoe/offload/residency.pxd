cimport cython

from finemoe.offload.cache cimport ExpertCache
from finemoe.offload.eviction cimport Recency
from finemoe.offload.hooks cimport table_fault, told
from finemoe.offload.transfer cimport Chunk, TransferQueue


cdef double INFINITE


cdef class Residency:
    cdef readonly object shape, plan, policy
    cdef readonly ExpertCache cache
    cdef readonly list experts, queues
    cdef public object wake
    cdef object _on_outcome, _on_load
    cdef dict _places
    cdef tuple _table_shape
    cdef Recency _recency
    cdef int _per_layer, _devices
    cdef long long _iteration
    cdef int _layer

    cpdef begin_iteration(self, iteration)
    @cython.locals(
        first=int, index=int, place=int, hits=list, late=list, misses=list, queue=TransferQueue
    )
    cpdef gate(self, iteration, int layer, activated)
    @cython.locals(first=int)
    cpdef prefetch(self, long long iteration_number, wishes, hook, int layer=*)
    @cython.locals(in_time=bint, known=bint, start=int, place=int, priority=double)
    cdef _prefetch_each(self, wishes, int first, hook, int layer)
    @cython.locals(table="const double[::1]", queue=TransferQueue)
    cdef _prefetch_table(self, wishes, int first, hook, int layer)
    @cython.locals(queue=TransferQueue)
    cpdef bint settled(self)
    cpdef bint is_pinned(self, int place)
    cpdef release(self, int place)
    cpdef Chunk next_chunk(self, int device)
    @cython.locals(loaded=bint)
    cpdef bint chunk_done(self, int device, Chunk chunk)
    cdef TransferQueue _queue(self, int place)
