"""Object detection on PASCAL VOC, and on generated data in its format."""
