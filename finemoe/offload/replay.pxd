cimport cython

from finemoe.offload.hooks cimport told
from finemoe.offload.model_thread cimport ModelThread
from finemoe.offload.residency cimport Residency
from finemoe.offload.virtual_links cimport VirtualLinks


cdef class ReplayRuntime:
    cdef readonly object policy
    cdef readonly Residency residency
    cdef public object phases
    cdef readonly list listeners
    cdef readonly double now
    cdef object _costs, _timeline, _arrived, _searches
    cdef VirtualLinks _links
    cdef ModelThread _model_thread
    cdef list _events, _devices_free
    cdef dict _known_seconds
    cdef long long _tickets
    cdef int _per_layer
    cdef bint _observed, _background, _hidden, _awaited

    cdef _layer(self, routed, int layer)
    @cython.locals(end=double, finished=double, waiting=int, first=int, place=int)
    cdef _compute(self, outcome, counts)
    @cython.locals(device=int, seconds=double, free=double, began=double, end=double)
    cdef double _run_expert(self, int place, tokens)
    @cython.locals(began=double)
    cdef double _expert_seconds(self, tokens)
    cdef _await_arrival(self)
    @cython.locals(began=double)
    cdef _await_prefetches(self)
    cdef _resume(self)
    cdef _collect(self)
    @cython.locals(began=double)
    cdef _ask(self, phase, number, call, double seconds, hook, int layer=*)
    cdef _at(self, double time, action)
    @cython.locals(events=list, links=VirtualLinks)
    cdef _advance(self, double to)
    cdef _step(self)
    cdef _span(self, track, name, double start, double end)
    cdef _happen(self)
