"""Speed beside a floor and a peer, one command each."""
