"""The frozen records that cross layers, and the protocol every method follows.

Words: query (image to judge), support (K normal images of the same task), task (organ/modality data set), teacher
(frozen), student (trained), anomaly map (per pixel), image score (per image).  Higher always means more anomalous.
Shapes: B batch, K shots, C channels, H W pixels, h w feature cells.
"""

from anatomaly.types.cuts import Axis as Axis
from anatomaly.types.cuts import Cut as Cut
from anatomaly.types.records import Calibration as Calibration
from anatomaly.types.records import Comparison as Comparison
from anatomaly.types.records import Features as Features
from anatomaly.types.records import Image as Image
from anatomaly.types.records import Method as Method
from anatomaly.types.records import Origin as Origin
from anatomaly.types.records import Prediction as Prediction
from anatomaly.types.records import Sample as Sample
from anatomaly.types.records import Split as Split
from anatomaly.types.records import SupportBank as SupportBank
from anatomaly.types.settings import Intensity as Intensity
from anatomaly.types.settings import Preprocessing as Preprocessing
from anatomaly.types.settings import Scoring as Scoring
