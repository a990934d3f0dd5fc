"""What a retrieval service counts, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PREFIX = "sd_search_retriever"


class ServiceMetrics:
    """Requests by status, queries, and a histogram of the seconds a request took."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()
        self._num_queries = self._num_cut = self._num_blank = 0
        self._buckets = [0] * (len(_BUCKETS_S) + 1)
        self._total_s = 0.0

    def record(self, *, status: int, num_queries: int, seconds: float) -> None:
        """Count one request."""
        self._requests[status] += 1
        self._num_queries += num_queries
        self._buckets[bisect_left(_BUCKETS_S, seconds)] += 1
        self._total_s += seconds

    def count_queries(self, *, num_cut: int, num_blank: int) -> None:
        """Of one request: queries that were longer than they may be, and that had nothing in them."""
        self._num_cut += num_cut
        self._num_blank += num_blank

    def render(self, gauges: dict[str, float]) -> str:
        """The text; `gauges` are further values of this moment."""
        lines = [f"# TYPE {_PREFIX}_requests_total counter"]
        lines += [
            f'{_PREFIX}_requests_total{{status="{status}"}} {n}'
            for status, n in sorted(self._requests.items())
        ]
        counts = {
            "queries": self._num_queries,
            "queries_cut": self._num_cut,
            "queries_blank": self._num_blank,
        }
        for name, count in counts.items():
            lines += [f"# TYPE {_PREFIX}_{name}_total counter", f"{_PREFIX}_{name}_total {count}"]
        lines.append(f"# TYPE {_PREFIX}_request_seconds histogram")
        total = 0
        for bound, count in zip((*_BUCKETS_S, "+Inf"), self._buckets, strict=True):
            total += count
            lines.append(f'{_PREFIX}_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [
            f"{_PREFIX}_request_seconds_sum {self._total_s:.6f}",
            f"{_PREFIX}_request_seconds_count {total}",
        ]
        for name, value in gauges.items():
            lines += [f"# TYPE {_PREFIX}_{name} gauge", f"{_PREFIX}_{name} {value:g}"]
        return "\n".join(lines) + "\n"
