"""Detections and ground truth become COCO AP and paired bootstrap intervals."""
