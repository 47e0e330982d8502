cimport cython

@cython.locals(best=int, place=int, highest=double)
cpdef int largest(const double[::1] values, double limit=*)

@cython.locals(best=int, place=int, highest=double, value=double, nothing=double)
cpdef int largest_marked(const double[::1] values, bytearray marks, int first, int step)

cpdef int first_marked(bytearray marks, int first, int step)
