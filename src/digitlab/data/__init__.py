"""The digits: files that are found or fetched and verified, split, augmented and formed into
batches."""
