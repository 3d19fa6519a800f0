// Threads, taken from the OpenMP runtime that torch itself runs on.
//
// Two OpenMP runtimes in one process fight for the cores. Linking one here would bind by file name, and torch's wheels
// bring theirs under changing names (libgomp.so.1, libgomp-a49a47f9.so.1.0.0, ...). So nothing is linked: at import the
// caller looks up the entry points below in torch's own copy and hands them in. Without them, work runs in one thread.
#pragma once

#include <cstdint>

namespace lrpfast {

// The entry points of libgomp, which LLVM's and Intel's runtimes export as well.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*thread_num)();                                                                 // omp_get_thread_num
  int (*num_threads)();                                                                // omp_get_num_threads
};

void bind_openmp(const OpenMP& openmp);
bool openmp_bound();

// Calls body(context, begin, end) on disjoint ranges that cover [0, size), at most `threads` at a time. No range but the
// last is smaller than `grain`, and each starts at a multiple of `unit`: 64 elements share no cache line with the next.
void parallel_for(std::int64_t size, std::int64_t grain, std::int64_t unit, int threads,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end), const void* context);

}  // namespace lrpfast
