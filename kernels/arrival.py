"""Finishing a sum in the last of several programs that contribute to it, in an order that does not depend on which.

Every program stores its part and then counts itself; the one that finds all others counted adds the parts up. Which one
that is changes from run to run, the order of the sum does not, so results are bit-equal. It saves the launch of a
kernel that only adds.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(arrivals, mask, count=1):
    """Count this program, as so many, at the given counters, once all of its stores are visible on the device.

    Returns what they held before; 0 where ``mask`` is false. Loads after it see what every program stored that counted
    itself before, if they bypass the first cache (``.cg``).
    """
    tl.debug_barrier()  # the stores of all threads come before the count of any
    before = tl.atomic_add(arrivals, count, mask=mask, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return tl.where(mask, before, 0)
