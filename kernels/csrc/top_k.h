// The k likeliest tokens of a row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

struct TopK {
  struct Candidate {
    float logit;
    int64_t column;
  };

  size_t k;
  float lowest = -std::numeric_limits<float>::infinity();  // what a logit must exceed to come in
  std::vector<Candidate> candidates = {};                  // the k likeliest at the last cut, and those since then that may be

  // In the order of columns. NaNs are passed over.
  void add(float logit, int64_t column) {
    if (!(logit > lowest)) return;
    candidates.push_back({logit, column});
    if (candidates.size() >= 2 * k) cut();
  }

  // Their columns, increasing; of equal logits the first ones. A row of NaNs may have fewer than k: the last column fills up.
  std::vector<int64_t> columns(int64_t vocabulary) {
    cut();
    std::vector<int64_t> result;
    for (const Candidate& candidate : candidates) result.push_back(candidate.column);
    std::sort(result.begin(), result.end());
    result.resize(k, vocabulary - 1);
    return result;
  }

 private:
  void cut() {
    if (candidates.size() < k) return;
    const auto is_likelier = [](const Candidate& a, const Candidate& b) {
      return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
    };
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), is_likelier);
    candidates.resize(k);
    lowest = candidates.back().logit;
  }
};
