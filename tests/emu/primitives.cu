// primitives.cu: what nvcc compiles for bench/static/selftest_device.py.

#include "primitive_entries.h"
