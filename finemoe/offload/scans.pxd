cimport cython

cdef double LOWEST

@cython.locals(best=int, place=int, highest=double)
cpdef int largest(const double[::1] values, int start, int stop, double limit)

@cython.locals(best=int, at=int, place=int, highest=double, value=double)
cpdef int largest_of(const double[::1] values, const int[::1] places, int start, int stop)
