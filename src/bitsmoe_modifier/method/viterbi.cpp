// Viterbi's algorithm for tail-biting trellis codes (docs/format.md, "Trellis codes"), LANES sequences at a time.
//
// Window t of a sequence is bits [b t, b t + L) of its circular stream, so that window t + 1 keeps the upper L - b bits
// of window t as its lower ones. A state is those kept bits. The minimum over the 2^b windows that end in a state
// carries the number of the window that attained it in its lowest b mantissa bits: of two sums that differ by less, which
// one wins is of no consequence, and tracing a path back is one load per weight. Where those bits are many, costs are
// counted from the least one, so that they stay as small as the errors of a few weights.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int L = 8, WINDOWS = 1 << L, LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats least(Floats a, Floats b) { return a < b ? a : b; }
inline Floats spread(float x) { return x - Floats{}; }

// Costs of all states before a weight to those after it.
template <int B>
inline void advance(const Floats* before, Floats* after, Floats target, Floats gain, const float* table) {
  constexpr int STATES = WINDOWS >> B, BRANCHES = 1 << B, TOGETHER = BRANCHES < 4 ? BRANCHES : 4;
  Floats shifted[STATES];
  if (B > 2) {
    Floats base = before[0];
    for (int state = 1; state < STATES; ++state) base = least(base, before[state]);
    for (int state = 0; state < STATES; ++state) shifted[state] = before[state] - base;
    before = shifted;
  }
  for (int state = 0; state < STATES; ++state) {
    Floats best = spread(3e38f);
#pragma GCC unroll 4
    for (int first = 0; first < BRANCHES; first += TOGETHER) {
      Floats costs[TOGETHER];
#pragma GCC unroll 4
      for (int n = 0; n < TOGETHER; ++n) {
        const int branch = first + n, window = state << B | branch;
        const Floats rest = target - gain * table[window];
        const Floats cost = rest * rest + before[window & (STATES - 1)];
        costs[n] = (Floats)(((Ints)cost & ~(BRANCHES - 1)) | branch);
      }
      // pairs first: a chain of minima, one after the other, would be what takes the time
      costs[0] = least(costs[0], costs[1]);
      if (TOGETHER == 4) costs[0] = least(costs[0], least(costs[TOGETHER - 2], costs[TOGETHER - 1]));
      best = least(best, costs[0]);
    }
    after[state] = best;
  }
}

template <int B>
inline int branch_of(const Floats* costs, int state, int lane) {
  int32_t bits;
  std::memcpy(&bits, reinterpret_cast<const float*>(costs + state) + lane, 4);
  return bits & ((1 << B) - 1);
}

// target, gain [length]; costs: room for (max(length, 2 prelude) + 1) * states; windows out [length][LANES].
template <int B>
void encode_lanes(const Floats* target, const Floats* gain, int length, int prelude, const float* table, Floats* costs,
                  uint8_t* windows) {
  constexpr int STATES = WINDOWS >> B;
  int closing[LANES] = {};
  if (B < L) {
    // a free run over the end and the beginning finds the bits that both share
    prelude = std::min(prelude, length);
    for (int state = 0; state < STATES; ++state) costs[state] = spread(0.f);
    for (int n = 0; n < 2 * prelude; ++n) {
      const int at = (length - prelude + n) % length;
      advance<B>(costs + n * STATES, costs + (n + 1) * STATES, target[at], gain[at], table);
    }
    for (int lane = 0; lane < LANES; ++lane) {
      const Floats* last = costs + 2 * prelude * STATES;
      int state = 0;
      for (int other = 1; other < STATES; ++other)
        if (last[other][lane] < last[state][lane]) state = other;
      for (int n = 2 * prelude; n > prelude; --n) {
        const int window = state << B | branch_of<B>(costs + n * STATES, state, lane);
        state = window & (STATES - 1);
      }
      closing[lane] = state;
    }
  }
  for (int state = 0; state < STATES; ++state)
    for (int lane = 0; lane < LANES; ++lane) costs[state][lane] = closing[lane] == state ? 0.f : 1e30f;
  for (int at = 0; at < length; ++at)
    advance<B>(costs + at * STATES, costs + (at + 1) * STATES, target[at], gain[at], table);
  int state[LANES];
  std::copy(closing, closing + LANES, state);
  for (int at = length - 1; at >= 0; --at)
    for (int lane = 0; lane < LANES; ++lane) {
      const int window = state[lane] << B | branch_of<B>(costs + (at + 1) * STATES, state[lane], lane);
      windows[at * LANES + lane] = (uint8_t)window;
      state[lane] = window & (STATES - 1);
    }
}

struct Job {
  int64_t first;
  int count;
};

}  // namespace

// Encode sequences of weights that lie scattered in one array; see native_viterbi.py for the arguments. Of the jobs, of
// which there are as many as it takes LANES sequences of equal width and length, one part of several.
extern "C" void bitsmoe_encode(const float* target, const float* gain, const int64_t* begin, const int64_t* place,
                               const int32_t* width, int64_t sequences, const float* tables, const int32_t* preludes,
                               int part, int parts, uint8_t* windows) {
  std::vector<int64_t> order(sequences);
  for (int64_t i = 0; i < sequences; ++i) order[i] = i;
  const auto length = [&](int64_t i) { return (int)(begin[i + 1] - begin[i]); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return width[a] != width[b] ? width[a] < width[b] : length(a) < length(b);
  });
  std::vector<Job> jobs;
  int64_t room = 0;
  int longest = 1;
  for (int64_t i = 0; i < sequences;) {
    int64_t j = i;
    while (j < sequences && j - i < LANES && width[order[j]] == width[order[i]] && length(order[j]) == length(order[i]))
      ++j;
    jobs.push_back({i, (int)(j - i)});
    const int b = width[order[i]], steps = std::max(length(order[i]), 2 * std::min(preludes[b], length(order[i])));
    room = std::max(room, (int64_t)(steps + 1) * (WINDOWS >> b));
    longest = std::max(longest, length(order[i]));
    i = j;
  }
  Floats* costs = (Floats*)std::aligned_alloc(64, room * sizeof(Floats));
  Floats* targets = (Floats*)std::aligned_alloc(64, longest * sizeof(Floats));
  Floats* gains = (Floats*)std::aligned_alloc(64, longest * sizeof(Floats));
  std::vector<uint8_t> found((size_t)longest * LANES);
  for (size_t k = part; k < jobs.size(); k += parts) {
    const int64_t first = order[jobs[k].first];
    const int steps = length(first), b = width[first];
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t* at = place + begin[order[jobs[k].first + std::min(lane, jobs[k].count - 1)]];
      for (int t = 0; t < steps; ++t) {
        targets[t][lane] = target[at[t]];
        gains[t][lane] = gain[at[t]];
      }
    }
    const float* table = tables + (int64_t)b * WINDOWS;
    switch (b) {
      case 1: encode_lanes<1>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
      case 2: encode_lanes<2>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
      case 3: encode_lanes<3>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
      case 4: encode_lanes<4>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
      case 6: encode_lanes<6>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
      case 8: encode_lanes<8>(targets, gains, steps, preludes[b], table, costs, found.data()); break;
    }
    for (int lane = 0; lane < jobs[k].count; ++lane) {
      const int64_t* at = place + begin[order[jobs[k].first + lane]];
      for (int t = 0; t < steps; ++t) windows[at[t]] = found[t * LANES + lane];
    }
  }
  std::free(costs);
  std::free(targets);
  std::free(gains);
}
