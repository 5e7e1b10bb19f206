"""Round weights so that output errors cancel: second moments and error feedback."""
