// The two functions that TensorRT looks up in a plugin library. Nothing else is exported, and
// nothing registers itself: the registry that loads the library asks for the creators.
#include <NvInferRuntime.h>

#include "creator.h"
#include "log.h"

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  dwattn::trt::set_logger_finder(finder);
}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static dwattn::trt::DwCreator wide(false), narrow(true);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&wide, &narrow};
  count = 2;
  return creators;
}

}  // extern "C"
