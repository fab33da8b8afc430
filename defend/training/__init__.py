"""DP-SGD in any training loop: the core that Lightning's callback and plain loops share."""
