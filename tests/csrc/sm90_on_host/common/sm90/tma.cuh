#pragma once
#include "sm90_on_host.h"
