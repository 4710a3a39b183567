// What a call complains about, for tests of several folders.
#pragma once
#include <gtest/gtest.h>

#include <string>

#include "sim/base/error.h"

namespace mop {

// The message of the UserError that `call` throws; "" and a test failure when it throws none.
template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const UserError& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << "not one line: " << message;
    return message;
  }
  ADD_FAILURE() << "no UserError";
  return "";
}

}  // namespace mop
