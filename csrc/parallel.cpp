#include "parallel.h"

#include <algorithm>

namespace lrpfast {
namespace {

OpenMP openmp = {nullptr, nullptr, nullptr};

struct Job {
  std::int64_t size, unit;
  void (*body)(const void*, std::int64_t, std::int64_t);
  const void* context;
};

void run_share(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  // The team may be smaller than what was asked for, so each member derives its share from the team it is in.
  const std::int64_t members = openmp.num_threads();
  const std::int64_t share = ((job.size + members - 1) / members + job.unit - 1) / job.unit * job.unit;
  const std::int64_t begin = std::min(job.size, share * openmp.thread_num());
  const std::int64_t end = std::min(job.size, begin + share);
  if (begin < end) {
    job.body(job.context, begin, end);
  }
}

}  // namespace

void bind_openmp(const OpenMP& entry_points) { openmp = entry_points; }

bool openmp_bound() { return openmp.parallel != nullptr; }

void parallel_for(std::int64_t size, std::int64_t grain, std::int64_t unit, int threads,
                  void (*body)(const void*, std::int64_t, std::int64_t), const void* context) {
  const std::int64_t useful = std::min<std::int64_t>(threads, size / grain);
  if (useful <= 1 || !openmp_bound()) {
    if (size > 0) {
      body(context, 0, size);
    }
    return;
  }
  Job job = {size, unit, body, context};
  openmp.parallel(run_share, &job, static_cast<unsigned>(useful), 0);
}

}  // namespace lrpfast
