cimport cython


cdef class ModelThread:
    cdef readonly double resume
    cdef double _dense_after, _dense_beside, _expert_after, _expert_beside
    cdef bint _dense_waited, _expert_waited

    cpdef waited(self)
    @cython.locals(seconds=double)
    cpdef double dense(self, bint copying)
    @cython.locals(seconds=double)
    cpdef double expert(self, bint copying)
