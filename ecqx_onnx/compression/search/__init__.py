"""Turn one dial until the file keeps to its bounds: allocation, points, quality."""
