"""Detections and ground truth become COCO AP and intervals of AP over images."""
