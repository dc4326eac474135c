"""One layer from dense experts to codes (docs/method.md), a file per step of the paper.

In: a layer's dense experts and its routed tokens. Out: `PackedExperts` and a report. Order: `layer`, `statistics`,
`spectral` (bases), `costs`, `allocation`, `rounding`; `design` joins the first five, `quantize` all of them.
May import: storage. Knows no framework but torch and scipy.
"""
