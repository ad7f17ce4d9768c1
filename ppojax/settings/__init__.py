"""Settings from YAML files and the command line: reading, provenance, faults, help. Knows no component."""

from ppojax.settings.help import help_text as help_text
from ppojax.settings.load import Contradiction as Contradiction
from ppojax.settings.load import Loaded as Loaded
from ppojax.settings.load import Settings as Settings
from ppojax.settings.load import load_config as load_config
