cdef class ModelThread:
    cdef readonly double resume
    cdef object _costs
    cdef bint _dense_waited, _expert_waited

    cpdef waited(self)
    cpdef double dense(self, bint copying)
    cpdef double expert(self, bint copying)
