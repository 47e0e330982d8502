cdef class Table:
    cdef readonly object values
    cdef double[:, ::1] _cells

    cpdef put(self, int layer, int index, double value)
