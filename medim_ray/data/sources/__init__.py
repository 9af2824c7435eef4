"""Sources of images and reports, one file a dataset family. Each import line makes one known in SOURCES."""

from medim_ray.data.sources import columnar as columnar
from medim_ray.data.sources import csv as csv
from medim_ray.data.sources import dicom as dicom
from medim_ray.data.sources import folder as folder
from medim_ray.data.sources import phantom as phantom
from medim_ray.data.sources import webdataset as webdataset
from medim_ray.data.sources.base import SOURCES as SOURCES
