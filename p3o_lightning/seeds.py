"""Counter-based seeds: randomness is a function of (seed, rollout, position, rank), so there is no generator state to save or to lose."""

_MASK = 0x7FFF_FFFF_FFFF_FFFF


def mix(*counters: int) -> int:
    """Hash integers to one seed in [0, 2**63): a splitmix64-style multiply-add chain, equal on every platform."""
    state = 0x9E37_79B9_7F4A_7C15
    for counter in counters:
        state = ((state ^ (counter & _MASK)) * 0xBF58_476D_1CE4_E5B9 + 0x94D0_49BB_1331_11EB) & _MASK
        state ^= state >> 31  # the product's low bits depend only on low bits: fold the high ones down
    return state
