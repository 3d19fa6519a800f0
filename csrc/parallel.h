// Threads, taken from the OpenMP runtime that torch itself runs on.
//
// Two OpenMP runtimes in one process fight for the cores. Linking one here would bind by file name, and torch's wheels
// bring theirs under changing names (libgomp.so.1, libgomp-a49a47f9.so.1.0.0, ...). So nothing is linked: at import the
// caller looks up the entry points below in torch's own copy and hands them in. Without them, work runs in one thread.
#pragma once

#include <atomic>
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

// Work that is dealt into pieces as it is done, so that a thread that is slower, or is kept waiting, holds no other up. Each begins
// with pieces of its own, those that it would have had anyway, and then takes what is left of the others'.
class Pieces {
 public:
  struct alignas(64) Taken {
    std::atomic<std::int64_t> count{0};
  };

  Pieces(int member, int members, Taken* taken) : member_(member), members_(members), taken_(taken) {}

  // The number of a piece of `count`, always the same count, that nobody else is given; -1: there is none left.
  std::int64_t next(std::int64_t count);

  int member() const { return member_; }  // of the threads, from 0 on

 private:
  int member_, members_, exhausted_ = 0;
  Taken* taken_;  // one a member
};

// Calls body(context, pieces) in each of at most `threads` threads.
void parallel_pieces(int threads, void (*body)(const void* context, Pieces& pieces), const void* context);

// Calls body(context, begin, end) on disjoint ranges that cover [0, size), at most `threads` at a time. No range but the
// last is smaller than `grain`, and each starts at a multiple of `unit`: 64 elements share no cache line with the next. There are
// `pieces` ranges a thread, see above.
void parallel_for(std::int64_t size, std::int64_t grain, std::int64_t unit, int threads,
                  void (*body)(const void* context, std::int64_t begin, std::int64_t end), const void* context,
                  std::int64_t pieces = 4);

}  // namespace lrpfast
