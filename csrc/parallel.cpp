#include "parallel.h"

#include <algorithm>
#include <vector>

namespace lrpfast {
namespace {

OpenMP openmp = {nullptr, nullptr, nullptr};

struct Job {
  void (*body)(const void*, Pieces&);
  const void* context;
  Pieces::Taken* taken;
};

void run_member(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  // The team may be smaller than what was asked for, so pieces are shared out by the team they are in.
  Pieces pieces(openmp.thread_num(), openmp.num_threads(), job.taken);
  job.body(job.context, pieces);
}

struct Ranges {
  std::int64_t size, piece;
  void (*body)(const void*, std::int64_t, std::int64_t);
  const void* context;
};

void run_ranges(const void* data, Pieces& pieces) {
  const Ranges& ranges = *static_cast<const Ranges*>(data);
  const std::int64_t count = (ranges.size + ranges.piece - 1) / ranges.piece;
  for (std::int64_t i = pieces.next(count); i >= 0; i = pieces.next(count)) {
    ranges.body(ranges.context, i * ranges.piece, std::min(ranges.size, (i + 1) * ranges.piece));
  }
}

}  // namespace

void bind_openmp(const OpenMP& entry_points) { openmp = entry_points; }

bool openmp_bound() { return openmp.parallel != nullptr; }

std::int64_t Pieces::next(std::int64_t count) {
  for (; exhausted_ < members_; ++exhausted_) {
    const std::int64_t owner = (member_ + exhausted_) % members_;
    const std::int64_t piece = count * owner / members_ + taken_[owner].count.fetch_add(1, std::memory_order_relaxed);
    if (piece < count * (owner + 1) / members_) {
      return piece;
    }
  }
  return -1;
}

void parallel_pieces(int threads, void (*body)(const void*, Pieces&), const void* context) {
  std::vector<Pieces::Taken> taken(static_cast<std::size_t>(std::max(threads, 1)));
  if (threads <= 1 || !openmp_bound()) {
    Pieces all(0, 1, taken.data());
    body(context, all);
    return;
  }
  Job job = {body, context, taken.data()};
  openmp.parallel(run_member, &job, static_cast<unsigned>(threads), 0);
}

void parallel_for(std::int64_t size, std::int64_t grain, std::int64_t unit, int threads,
                  void (*body)(const void*, std::int64_t, std::int64_t), const void* context, std::int64_t pieces) {
  const std::int64_t useful = std::min<std::int64_t>(threads, size / grain);
  if (useful <= 1) {
    if (size > 0) {
      body(context, 0, size);
    }
    return;
  }
  pieces = std::min(pieces * useful, size / grain);
  const std::int64_t piece = (size + pieces - 1) / pieces;
  const Ranges ranges = {size, (piece + unit - 1) / unit * unit, body, context};
  parallel_pieces(static_cast<int>(useful), run_ranges, &ranges);
}

}  // namespace lrpfast
