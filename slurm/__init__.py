"""Many jobs: what they cost, and how they are sent and watched."""
