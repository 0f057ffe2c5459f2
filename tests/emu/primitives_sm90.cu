// primitives_sm90.cu: what nvcc compiles for bench/static/selftest_device.py on sm_90.

#include "primitive_entries_sm90.h"
