"""Training data: pictures with captions and masks, buckets by aspect ratio, class pictures, the cache, the order of samples."""
