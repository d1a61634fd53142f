// How a launcher reports failure to its registration: it never throws, prints or exits.
#pragma once

namespace zebra {

struct Status {
  const char* error = nullptr;  // nullptr: success; otherwise static text
};

}  // namespace zebra
