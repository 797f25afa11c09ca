"""One file a job of the paper, each giving its inputs, targets, loss, metrics and evaluation.

TASKS is where a config's `task` is chosen; protocol.py says what each must offer.
"""

from gapjax.tasks.augshift import AugShiftTask
from gapjax.tasks.canvas import CanvasTask
from gapjax.tasks.protocol import Task
from gapjax.tasks.segmentation import SegmentationTask

TASKS: dict[str, type[Task]] = {
  'canvas': CanvasTask, 'classification': AugShiftTask, 'segmentation': SegmentationTask}
