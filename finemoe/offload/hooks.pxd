cdef object FLOAT64

cpdef told(hook, int layer, tuple arguments)
cpdef str table_fault(values, tuple due)
