cimport cython

from finemoe.offload.residency cimport Residency
from finemoe.offload.transfer cimport Chunk, TransferQueue

cdef double NEVER


cdef class _Lane:
    cdef Chunk span
    cdef double began, moves_from, sent, end

    cdef double moved(self, double now, double speed)


cdef class VirtualLinks:
    cdef readonly double next_event
    cdef readonly int copying
    cdef Residency _residency
    cdef list _queues, _lanes, _speeds
    cdef object _timeline
    cdef double _wake, _latency, _lag, _speed
    cdef int _chunks_in_flight
    cdef long long _chunk_bytes

    @cython.locals(device=int, lane=_Lane)
    cpdef kick(self, double now)
    @cython.locals(device=int, lane=_Lane, span=Chunk)
    cpdef progress(self, double now)
    @cython.locals(queue=TransferQueue, span=Chunk)
    cdef _start(self, int device, _Lane lane, double now, double wake)
    @cython.locals(
        queue=TransferQueue,
        span=Chunk,
        moved=double,
        settled=double,
        begun=cython.longlong,
        kept=cython.longlong,
    )
    cdef _yield(self, int device, _Lane lane, double now)
    @cython.locals(lane=_Lane, speed=double)
    cdef _settle(self, double now)
    cdef _change_speed(self, _Lane lane, Chunk span, double now, double speed)
